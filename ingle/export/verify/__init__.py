"""Verifies exports by comparing another program that reads them with Ingle."""
