"""Registered experiments; every module below is imported by the registry."""
