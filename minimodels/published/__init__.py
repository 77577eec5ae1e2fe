"""Checkpoints in the Hugging Face format."""


def from_pretrained(*arguments, **options):
    from minimodels.published.pretrained import from_pretrained as read

    return read(*arguments, **options)


def save_pretrained(*arguments, **options):
    from minimodels.published.pretrained import save_pretrained as write

    return write(*arguments, **options)
