"""Questions of more than one run: why do two runs differ?"""
