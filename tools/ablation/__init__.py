"""PERA's terms against LoRA on two tasks, with tuned rates, several seeds and intervals."""
