"""Import from and export to Hugging Face. Import names from the modules: most of them need torch."""
