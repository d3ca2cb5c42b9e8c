"""Training: what Ray Train and what freezing add to a fine-tune."""
