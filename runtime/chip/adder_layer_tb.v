// Runs one adder layer of the package on its golden input and compares accumulators and outputs with the golden ones.
//
//   cd PACKAGE/verilog && iverilog -g2005 -o layer adder_layer.v adder_layer_tb.v && vvp layer
//
// layer.vh has the layer's geometry and the names of its files.
`timescale 1ns / 1ns
`include "layer.vh"

module adder_layer_tb;
    reg clock = 0, reset = 1;
    wire valid, done;
    wire [31:0] address;
    wire signed [`ACC_BITS-1:0] accumulator;
    wire [7:0] result;
    reg [31:0] golden_accumulator [0:`O*`OH*`OW-1];
    reg [31:0] golden_output [0:`O*`OH*`OW-1];
    integer checked = 0, wrong = 0;
    wire signed [31:0] wide = accumulator;

    adder_layer #(
        .C(`C), .H(`H), .W(`W), .O(`O), .OH(`OH), .OW(`OW), .KH(`KH), .KW(`KW),
        .STRIDE_H(`STRIDE_H), .STRIDE_W(`STRIDE_W), .TOP(`TOP), .LEFT(`LEFT),
        .DILATION_H(`DILATION_H), .DILATION_W(`DILATION_W), .PAD_VALUE(`PAD_VALUE),
        .RESIDUAL(`RESIDUAL), .RESIDUAL_MULTIPLIER(`RESIDUAL_MULTIPLIER), .ACC_BITS(`ACC_BITS),
        .TOTAL_BITS(`TOTAL_BITS), .SHIFT(`SHIFT), .LOW(`LOW), .HIGH(`HIGH)
    ) layer (clock, reset, valid, address, accumulator, result, done);

    always #1 clock = ~clock;

    initial begin
        $readmemh(`WEIGHT_FILE, layer.weight);
        $readmemh(`MULTIPLIER_FILE, layer.multiplier);
        $readmemh(`BIAS_FILE, layer.bias);
        $readmemh(`INPUT_FILE, layer.x);
        if (`RESIDUAL) $readmemh(`RESIDUAL_FILE, layer.residual);
        $readmemh(`ACCUMULATOR_FILE, golden_accumulator);
        $readmemh(`OUTPUT_FILE, golden_output);
        #4 reset = 0;
    end

    always @(negedge clock) begin
        if (valid) begin
            checked = checked + 1;
            if (wide !== golden_accumulator[address] || {24'd0, result} !== golden_output[address]) begin
                wrong = wrong + 1;
                if (wrong <= 10)
                    $display("output %0d: accumulator %0d result %0d, golden %0d %0d", address, wide, result,
                             $signed(golden_accumulator[address]), golden_output[address]);
            end
        end
        if (done && !valid) begin
            if (wrong == 0 && checked == `O * `OH * `OW) $display("PASS: %0d outputs equal", checked);
            else $display("FAIL: %0d of %0d outputs differ", wrong, checked);
            $finish;
        end
    end
endmodule
