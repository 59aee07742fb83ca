"""What a run does beside training: its summary, its folder, saving on signals, resuming."""
