"""A model behind a server: publishing the student's weights to it, and generating by token ids."""
