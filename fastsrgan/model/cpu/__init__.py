"""Forms of the layers for the cores of a CPU. Never on CUDA."""
