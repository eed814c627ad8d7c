"""Evaluation: is the tuned model better than its base, by how much, and could it be chance?"""
