"""Networks that see clips: features and scores of others, read from files of the user's."""
