"""Operations that several architectures share, each with a reference first."""
