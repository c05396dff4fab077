"""The types that pass between router, dispatcher and experts."""
