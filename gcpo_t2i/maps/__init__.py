"""Credit made visible: which codes of an image get how much of its advantage, over the image itself.

pictures   a given file → an image that a policy can encode, safely
scored     a group of images of one prompt, scored; credit and advantage maps of it, without the policy
draw       maps over images, with numpy and PIL
figure     all maps of a group in one figure, with colour bars
arrays     everything as numbers: .npz and .json
results    the folder with all of it
remarks    what to know before believing a map, in sentences
training   the sample grid of a training step, with its advantage maps
command    `gcpo-t2i heatmap`
"""
