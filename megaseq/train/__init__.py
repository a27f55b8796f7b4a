"""The engine (one optimiser step) and the jobs around it: trainer, evaler, decoder."""
