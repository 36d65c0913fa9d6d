"""Search: many trials of one experiment, and an answer that can be trusted."""
