"""Model families: pure maths between the two uses of the matrix."""
