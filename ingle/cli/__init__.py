"""The command line: one short function per command that calls the Python API and prints.

Each command imports what it needs when it is called, so that ``ingle --help`` answers at once.
"""
