"""What meets the Hub: the card of a model, and the folder that is uploaded with it."""
