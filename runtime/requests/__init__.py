"""What a request asks for, and the loop that answers it."""
