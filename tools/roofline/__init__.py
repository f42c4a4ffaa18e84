"""What a layer costs if every launch runs at a card's rates: a model, made without a GPU."""
