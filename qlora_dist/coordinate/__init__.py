"""The coordinator: generations, commits, who is alive, and how the run ended; it knows nothing of Ray or torch."""
