"""Bodies of the model families: pure maths between the lookup and the loss."""
