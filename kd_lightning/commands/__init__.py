"""What the program does beside the trainer's verbs: a file a command, each with `main(words)`."""
