"""The verbs of the command line and their options. Heavy libraries are imported only once a verb needs them."""
