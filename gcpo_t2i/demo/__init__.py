"""A page in the browser that shows the credit: `gcpo-t2i demo`.

studio       the model, the rewards and the limits that all visitors share; without a page
views        what a visitor sees of images that are there: tiles, numbers, remarks; without a page
runs         training runs below a folder, also those that are still going; without a page
cellmap      maps side by side whose cells tell their numbers when pointed at
controls     what the tabs have in common: sliders, and errors as messages
generate     explain  training  comparison      one tab each
page         the tabs in one page
command      `gcpo-t2i demo`
"""
