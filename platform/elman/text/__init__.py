"""Corpora and tokenizers: from text to token ids."""
