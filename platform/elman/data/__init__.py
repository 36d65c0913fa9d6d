"""Windows over the token stream."""
