"""Callbacks for everything around training: summary, run folder, saving on signals, resuming."""
