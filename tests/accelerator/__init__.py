"""An accelerator that is not there, and what a model on it has to do as it does on the CPU."""
