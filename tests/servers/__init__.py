"""Servers that the tests of stores talk to, each in a `with` block of its own."""
