"""Publishing: what goes to the Hub, the card that says what it is, and how it gets there."""
