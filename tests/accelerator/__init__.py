"""A pretended accelerator, and checks that models compute the same on it as on the CPU."""
