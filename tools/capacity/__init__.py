"""How close PERA of rank r comes to a fixed matrix, in ranks that LoRA would need for the same."""
