"""Arithmetic in words, the built-in world of reasoning: questions, worked solutions, and what can be wrong with them.

problems    what happens to a number of things, the question that tells it, and the steps that answer it
corpus      what a small language model learns from: solutions of pupils who slip, and wrong ones on purpose
tokenizer   words and numbers, one token each, with a chat template
pretrain    the stage `reasoner` of `gcpo-t2i pretrain`
"""
