"""What a person types and sees: one module a command, and the console."""
