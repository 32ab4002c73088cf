"""Networks: pretrained backbones with a fresh head, and the folder a trained one is saved in."""
