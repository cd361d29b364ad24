"""Data: tables from files or the hub, conversations in their layouts, and conversations as tokens."""
