"""The maths: pure functions and kinds; tensors in, tensors out."""
