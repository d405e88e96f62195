"""What is said of data that cannot be trained on."""


class DataError(ValueError):
    """Data that cannot be trained on; the message names the first offender and what to do."""


class BadImage(DataError):
    """One image that cannot be read, whatever the settings; data.on_bad_image says what follows."""


class UnreachableImage(BadImage):
    """One image that the system does not hand out, which may change without the image being written anew."""
