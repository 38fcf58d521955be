"""Reading and writing of files: networks, data sets, images and downloads."""
