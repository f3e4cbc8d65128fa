"""The true shape of a large model: what each method costs there, and how far one layer tells about all of them."""
