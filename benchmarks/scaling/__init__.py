"""What a rank computes, holds and sends in a training step of an adapted Llama: a model."""
