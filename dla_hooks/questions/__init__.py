"""Questions of more than one run: why do two differ, and what if a part were not there?"""
