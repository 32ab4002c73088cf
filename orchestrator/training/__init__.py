"""Fine-tuning: data-parallel, resumable, the same code for one process or many, CPU or GPU."""
