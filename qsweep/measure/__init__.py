"""What is measured on an artifact: sizes, work, accuracy, parity, latency, memory."""
