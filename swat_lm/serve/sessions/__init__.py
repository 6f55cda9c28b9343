"""Conversations that go on: their state in a slot or in one file, every turn in a journal before it is acknowledged."""
