"""What is learned: the loss of a batch, decoding it, and how decoded text is scored."""
