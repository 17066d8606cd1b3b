"""One thin Prefect task around each stage; the folder says the layer, the file says the stage."""
