"""Results as pictures: what is drawn of them, and what the headings say."""
