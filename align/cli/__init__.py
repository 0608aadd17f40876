"""The verbs of the command line, each with its options; nothing heavy is imported before a verb needs it."""
