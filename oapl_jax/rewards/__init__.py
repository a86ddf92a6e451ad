"""Rewards: verifiers of responses, by task, and the Grader that picks one."""
